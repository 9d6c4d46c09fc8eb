"""What is measured about losses and models: geometry, curvature, dynamics."""
