"""Polygraphy on what moecompiler writes: plugins, engines as runners, inputs and results to compare, files for its tools."""
