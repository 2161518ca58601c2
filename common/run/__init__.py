"""What a run is made of. Nothing is handed on here: import the modules."""
