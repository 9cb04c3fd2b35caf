"""The main job: a recipe checked in full, run through TRL's trainers, and outputs proven by reloading."""
