print("package imported", __name__)
