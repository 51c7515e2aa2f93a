"""Files and directories: written so that none is ever half there, read as data that may be a stranger's.

Imports no other package.
"""
