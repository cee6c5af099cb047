"""Python's share of the benchmark: the interpreter's loop, calls, dictionaries, strings, floats, objects, big integers."""

import re
import sys


class Body:
    def __init__(self, place, speed, mass):
        self.place = place
        self.speed = speed
        self.mass = mass

    def pull(self, other, step):
        dx, dy, dz = (a - b for a, b in zip(self.place, other.place))
        square = dx * dx + dy * dy + dz * dz
        force = step / (square * square**0.5)
        mine, theirs = self.mass * force, other.mass * force
        self.speed = [v - d * theirs for v, d in zip(self.speed, (dx, dy, dz))]
        other.speed = [v + d * mine for v, d in zip(other.speed, (dx, dy, dz))]

    def move(self, step):
        self.place = [p + step * v for p, v in zip(self.place, self.speed)]


def orbits(steps):
    bodies = [
        Body([float(i), 0.5 * i * i, 1.0 / (i + 1)], [0.0, 0.1 * i, 0.05], 1.0 / (1 + i))
        for i in range(5)
    ]
    for _ in range(steps):
        for i, body in enumerate(bodies):
            for other in bodies[i + 1 :]:
                body.pull(other, 0.001)
        for body in bodies:
            body.move(0.001)
    return " ".join(f"{coordinate:.9f}" for body in bodies for coordinate in body.place)


def primes(limit):
    sieve = bytearray([1]) * limit
    sieve[0:2] = b"\0\0"
    for n in range(2, int(limit**0.5) + 1):
        if sieve[n]:
            sieve[n * n :: n] = bytes(len(range(n * n, limit, n)))
    return [n for n in range(limit) if sieve[n]]


def words(text):
    counts = {}
    for word in re.findall(r"[a-z]+", text.lower()):
        counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def paths(width, height):
    """Counts the ways through a grid with holes, by memoised recursion."""
    seen = {}

    def count(x, y):
        if x == 0 and y == 0:
            return 1
        if x < 0 or y < 0 or (x * 7 + y * 3) % 11 == 5:
            return 0
        if (x, y) not in seen:
            seen[x, y] = count(x - 1, y) + count(x, y - 1)
        return seen[x, y]

    return count(width, height)


def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


with open(sys.argv[1], encoding="ascii") as file:
    ranked = words(file.read())
print(len(ranked), ranked[:10])
print(orbits(3000))
found = primes(200_000)
print(len(found), sum(found) % 1_000_003)
print(paths(60, 60))
print(fibonacci(22), pow(3, 20_000) % (2**127 - 1), len(str(7**2000)))
