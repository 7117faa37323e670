"""Typed errors. Each message says what was wrong, with both numbers where there are two, and what to do."""


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""


class ConfigError(HeadraceError):
    """A setting is out of range, or two settings contradict each other."""


class RequestError(HeadraceError):
    """A request is malformed or asks for what is not supported; other requests are not affected."""


class SamplingError(RequestError):
    """No token can be chosen for a request: its logits are not finite, or every token is banned."""


class ResultsError(HeadraceError):
    """A results file, or a run in it, lacks a field or holds a number that is not finite."""


class CapacityError(HeadraceError):
    """A request or a model cannot fit in the memory it was given, now or ever."""


class ModelNotFoundError(HeadraceError):
    """A model name, alias or path leads nowhere, or its source cannot be reached."""


class ModelFileError(HeadraceError):
    """A model file is malformed. Names the file and the field, and both numbers where a bound was broken."""

    def __init__(self, path: object, field: str, problem: str) -> None:
        super().__init__(f"{path}: {field}: {problem}")
        self.path, self.field, self.problem = str(path), field, problem


class UnsupportedModelError(HeadraceError):
    """A well-formed model uses an architecture, rope, tensor type or format that Headrace does not support."""


class TemplateError(HeadraceError):
    """A chat template failed, or broke its time or size limit."""


class EngineDeadError(HeadraceError):
    """The engine or the process that it runs in is gone; what it was doing is lost unless someone replays it."""


class StageLostError(EngineDeadError):
    """A stage of a split model has no replica for now, and requests do not wait for one."""


class ChannelError(HeadraceError):
    """A channel between two processes is gone, full, or got what is no message. Names the channel."""


class HandshakeError(ChannelError):
    """Whoever is at the other end of a connection did not prove that it knows the shared secret."""
