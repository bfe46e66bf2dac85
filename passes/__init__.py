"""Graph-rewrite passes: one file each; ``pipelines`` names their orders."""
