"""The demo: trains students on handwritten digits by every method, and reports statistics and figures."""
