"""h2's frame parser, with a limit of our own."""

from __future__ import annotations

from h2.exceptions import DenialOfServiceError, ProtocolError
from h2.frame_buffer import FrameBuffer
from hyperframe.exceptions import InvalidPaddingError
from hyperframe.frame import Frame


class LimitedFrames(FrameBuffer):
    """h2's frame parser, with a limit on the headers that a stream begins with but never ends."""

    def __init__(self, server: bool, block_bytes_max: int) -> None:
        super().__init__(server)
        self._block_bytes_max = block_bytes_max

    def __next__(self) -> Frame:
        try:
            return super().__next__()
        except InvalidPaddingError as error:  # which h2 lets through
            raise ProtocolError("padding is longer than its frame") from error

    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        complete = super()._update_header_buffer(f)
        if sum(len(part.data) for part in self._headers_buffer) > self._block_bytes_max:
            raise DenialOfServiceError("header block too large")
        return complete
