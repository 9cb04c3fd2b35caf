"""The only importers of private upstream names; each file says which library, each use which versions."""
