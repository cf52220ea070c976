"""placeholder"""
class Relay:
    def __init__(self, n): pass
