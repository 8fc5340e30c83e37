import starts_child

print(starts_child.SAID)
