"""What the pages need and importers do not: data, models, training, plots, exercises."""
