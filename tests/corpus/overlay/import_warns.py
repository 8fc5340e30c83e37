import warnings

import warns_at_import

print(warnings.filters[0], warns_at_import.__name__)
