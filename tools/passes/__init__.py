"""The verbs of ``moecompiler passes``: what passes did, whether it was right, and which rewrite was not. One file each."""
