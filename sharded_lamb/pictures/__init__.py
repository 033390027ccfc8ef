"""Pictures of measurements and plans, drawn with matplotlib, which is optional."""
