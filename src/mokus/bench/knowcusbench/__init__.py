"""KnowCusBench: knowledge-aware customization, measured. Its data (`manifest`), what is drawn (`plan`), and how it is judged."""
