WHERE = "in more"
