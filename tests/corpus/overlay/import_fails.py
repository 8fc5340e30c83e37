import fails
