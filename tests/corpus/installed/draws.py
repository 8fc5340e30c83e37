import random

source = random.Random()
fixed = random.Random(7)
