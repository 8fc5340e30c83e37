import dataclasses
import enum
import inspect
import pickle
import typing


@dataclasses.dataclass
class Point:
    x: int
    y: "typing.Optional[int]" = None


class Colour(enum.Enum):
    RED = 1


print(pickle.loads(pickle.dumps(Point(1))), pickle.loads(pickle.dumps(Colour.RED)), typing.get_type_hints(Point))
print(inspect.getsource(Point), inspect.getsourcefile(Point), inspect.getmodule(Point).__name__)
