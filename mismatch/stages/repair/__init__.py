"""Train the swapped layer to give what the original gave, cheaply, and prove that it worked."""
