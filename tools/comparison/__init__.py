"""What ``moecompiler compare`` is made of: artifacts, their engines and programs, and levels measured on them."""
