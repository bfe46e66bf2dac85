"""What passes did to a graph and whether it was right: differences, numbers after each pass, and the rewrite that breaks them."""
