"""Train the swapped module to match the teacher's, cheaply, and measure what was recovered."""
