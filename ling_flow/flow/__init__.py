"""Component contract, identity, artifacts and the faces (KFP, command line, Python call) of a step."""
