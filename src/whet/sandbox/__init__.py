"""Code that must not take the trainer down with it: other processes, with deadlines, killed from outside.

What is here runs *graders and users' reward functions*: trusted code on untrusted inputs, which may hang, crash,
leak or print without end, but is not out to harm the machine. Programs that a model wrote need namespaces and
system-call filters; their room will stand behind this package too, and nothing here pretends to be it.
"""
