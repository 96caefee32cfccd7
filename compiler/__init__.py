"""The ground of reattend: what a graph is, what a site is, what a recipe asks for, and how each change is proven."""
