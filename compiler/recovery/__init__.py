"""Recovery: training back what a rewrite lost, from the original itself as the teacher."""
