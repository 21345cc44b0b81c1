"""The tensors of a TorchScript archive, the format of OpenAI's own CLIP weights, without torch.jit:
that would compile, and may run, code that the file brings along."""

import io
import pickle
import zipfile

import torch


class Node:
    """Stands for an object of any class that the archive names: holds attributes, does nothing."""

    def __init__(self, *unused):
        pass


class Reader(pickle.Unpickler):
    """Unpickles an archive's data.pkl: tensors, and Nodes in place of everything else."""

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.top = self.archive.namelist()[0].split("/")[0]
        super().__init__(io.BytesIO(self.archive.read(f"{self.top}/data.pkl")))

    def find_class(self, module, name):
        if name == "_rebuild_tensor_v2":
            return lambda data, start, size, stride, *unused: data.as_strided(size, stride, start)
        return getattr(torch, name).dtype if name.endswith("Storage") else Node

    def persistent_load(self, saved):
        _, dtype, key, _, _ = saved  # "storage", dtype, file, device, length
        content = self.archive.read(f"{self.top}/data/{key}")
        return torch.frombuffer(bytearray(content), dtype=dtype)


def tensors(path):
    """{name: tensor} of the archive at path, named as in a state dict; without attn_mask, the
    causal masks, which a model makes itself. Raises what zipfile and pickle do."""
    found = {}

    def collect(node, prefix):
        for name, value in vars(node).items():
            if isinstance(value, Node):
                collect(value, f"{prefix}{name}.")
            elif isinstance(value, torch.Tensor) and name != "attn_mask":
                found[prefix + name] = value

    collect(Reader(path).load(), "")
    return found
