"""Before the start: is everybody here and the same, and which layout is fastest?"""
