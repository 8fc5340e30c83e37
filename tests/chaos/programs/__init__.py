"""What the hostile overlays run. They stand in the overlays' folders as copies, and import nothing but each other."""
