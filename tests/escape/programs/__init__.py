"""What the overlays of the attempts are made of. Each gets a copy of these files, and imports them by bare names."""
