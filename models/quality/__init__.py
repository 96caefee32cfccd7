"""How good a rewritten model still is: tasks with held-out data, and the rows, tables and plots of what they found."""
