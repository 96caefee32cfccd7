"""How the shipped models were trained: on data that every machine has, by scripts that resume."""
