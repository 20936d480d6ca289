"""Train the swapped layer to give what the teacher's gives, cheaply, and prove that it worked."""
