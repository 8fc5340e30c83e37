WHERE = "installed"
