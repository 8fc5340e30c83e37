import warnings

warnings.warn("of the script")
warnings.warn("of nobody", stacklevel=2)
warnings.warn("old", DeprecationWarning)
for _ in range(2):
    warnings.warn("once", UserWarning)
print(warnings.filters)
