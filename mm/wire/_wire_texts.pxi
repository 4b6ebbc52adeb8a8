# The words that both data planes have for calls without an answer: mm/core/call_texts.py, as C has
# them. They are read once, at import; no thread runs before that.

from mm.core import call_texts

cdef list kept_texts = []


cdef const char *text_of(str text) except NULL:
    """Keep a text for good; its numbers are 64 bits wide."""
    cdef bytes encoded = text.replace("%d", "%lld").encode()
    kept_texts.append(encoded)
    return encoded


cdef const char *RUNTIME_SILENT = text_of(call_texts.RUNTIME_SILENT)
cdef const char *INSTANCE_GONE = text_of(call_texts.INSTANCE_GONE)
cdef const char *NOT_CONNECTED = text_of(call_texts.NOT_CONNECTED)
cdef const char *NO_ANSWER = text_of(call_texts.NO_ANSWER)
cdef const char *NO_HTTP2 = text_of(call_texts.NO_HTTP2)
cdef const char *NO_TLS = text_of(call_texts.NO_TLS)
cdef const char *OWN_SERVER = text_of(call_texts.OWN_SERVER)
cdef const char *CONNECTION_LOST = text_of(call_texts.CONNECTION_LOST)
cdef const char *CONNECTION_CLOSING = text_of(call_texts.CONNECTION_CLOSING)
cdef const char *STREAM_REFUSED = text_of(call_texts.STREAM_REFUSED)
cdef const char *UPSTREAM_RESET = text_of(
    call_texts.UPSTREAM_ENDED % call_texts.STREAM_RESET)
cdef const char *MALFORMED_RESPONSE = text_of(call_texts.MALFORMED_RESPONSE)
cdef const char *NO_STATUS = text_of(call_texts.NO_STATUS)
cdef const char *MESSAGE_TOO_LONG = text_of(call_texts.MESSAGE_TOO_LONG)
cdef const char *MESSAGE_FLAG = text_of(call_texts.MESSAGE_FLAG)
cdef const char *MESSAGE_CUT_OFF = text_of(call_texts.MESSAGE_CUT_OFF)
cdef const char *UNREADABLE_IDENTITY = text_of(call_texts.UNREADABLE_ENCODING % "identity")
cdef const char *DEADLINE_PASSED = text_of(call_texts.DEADLINE_EXCEEDED)
cdef const char *SHUTTING_DOWN = text_of(call_texts.SHUTTING_DOWN)
cdef const char *ENCODINGS_READ = text_of(call_texts.ENCODINGS_READ)
cdef const char *OUT_OF_MEMORY = b"out of memory"
