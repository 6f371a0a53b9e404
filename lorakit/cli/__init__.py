"""Floor 7: the verbs, one file each. A verb parses, calls one function and prints."""
