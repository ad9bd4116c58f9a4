"""Language models and text for the command line."""
