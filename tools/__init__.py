"""Command-line verbs, one file each, and measuring scripts."""
