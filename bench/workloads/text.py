"""What Python programs spend their time on: calls, dictionaries, lists, strings, objects. The argument is how often."""
import sys


class Node:
    __slots__ = ("key", "left", "right")

    def __init__(self, key):
        self.key, self.left, self.right = key, None, None

    def insert(self, key):
        if key < self.key:
            if self.left is None:
                self.left = Node(key)
            else:
                self.left.insert(key)
        elif key > self.key:
            if self.right is None:
                self.right = Node(key)
            else:
                self.right.insert(key)

    def depth(self):
        return 1 + max(child.depth() if child else 0 for child in (self.left, self.right))


def words(text):
    counts = {}
    for line in text.splitlines():
        for word in line.replace("(", " ").replace(")", " ").split():
            counts[word] = counts.get(word, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def queens(size, row=0, columns=0, up=0, down=0):
    if row == size:
        return 1
    free = ~(columns | up | down) & ((1 << size) - 1)
    found = 0
    while free:
        bit = free & -free
        free ^= bit
        found += queens(size, row + 1, columns | bit, (up | bit) << 1, (down | bit) >> 1)
    return found


with open("data/text", encoding="latin-1") as file:
    TEXT = file.read(100_000)
for number in range(int(sys.argv[1])):
    root, key = Node(500), 1
    for _ in range(1000):
        key = (key * 1103515245 + 12345 + number) % 2147483648
        root.insert(key % 10007)
    print(words(TEXT[number:])[:5], queens(6), root.depth(), pow(7, 12345 + number, 10**40 + 1))
