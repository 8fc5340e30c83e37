VALUE = "of the helper"
