"""What changes a graph: one file per published mechanism or rewrite, in families."""
