WHOSE = "the overlay's"
print("json runs")
