"""Join the two tasks of an adapted network in one softmax over the classes of both."""
