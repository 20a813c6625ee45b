"""Code in other processes, with deadlines, killed from outside, so that it cannot end the trainer.

Two kinds: *trusted* code on untrusted inputs (graders, reward functions of users), which may hang, crash, leak or
print without end (`workers`, `sessions`); and *programs that a model wrote*, which are confined too, by namespaces or
Landlock and by filters of system calls (`programs`, `jail`), or run on a server (`http`).
"""
