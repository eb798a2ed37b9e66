"""The demo: students distilled on handwritten digits, their statistics, figures and report page."""
