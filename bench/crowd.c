/* A gRPC client with thousands of connections, over TLS if asked: for what h2load cannot do, which
 * resumes no sessions, stays for no second run, and has all its connections call at once.
 *
 *   crowd PORT CONNECTIONS AT_ONCE plain|full|resumed stays|goes
 *
 * Opens so many connections, so many at a time; each makes one call, and is closed when it has the
 * answer, or stays. Prints the seconds until all have theirs. Then for each line SECONDS of its
 * input each connection calls once a second, evenly spread over it; prints how many answers there
 * were, and p50 and p99 of the microseconds to each, from when the call was due. Ends with its
 * input. "resumed": all handshakes but the first resume its session. Exits with 1 and a text for
 * any answer that is not whole, and any handshake that is not of the kind asked for. One thread,
 * epoll, frames by hand: its own share of the time is small.
 *   cc -O2 -o crowd crowd.c -lnghttp2 -lssl -lcrypto */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <nghttp2/nghttp2.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { BODY_BYTES = 205, REPLY_BYTES = 10, HEAD_BYTES = 9, IN_BYTES = 1 << 14, EVENTS = 256 };
enum { BLOCK_BYTES_MAX = 512, SILENT_S = 30 };
enum { DATA = 0, HEADERS = 1, RESET = 3, SETTINGS = 4, PING = 6, GOAWAY = 7 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4 };

struct peer {
  int fd;
  SSL *ssl;
  int is_shaking, is_calling;
  uint32_t stream; /* Of the last call. */
  uint32_t came;   /* Bytes of its answer. */
  uint64_t due_ns;
  uint32_t late_calls; /* That were due while this one was under way. */
  /* Where the frames that come stand. */
  uint8_t head[HEAD_BYTES];
  uint32_t head_bytes, frame_left;
};

static const uint64_t second_ns = 1000000000;
static int port, poller, stays;
static const char *kind;
static SSL_CTX *context;
static SSL_SESSION *session;
static struct peer **peers;
static long asked, opened, opening, answered;
static uint32_t *took_us;
static long took_count, took_max;
/* A call, with the place of its stream's number in both frames; the first has what goes before. */
static uint8_t first_call[2048], next_call[2048];
static size_t first_bytes, first_streams[2], next_bytes, next_streams[2];

static void die(const char *what) {
  fprintf(stderr, "crowd: %s\n", what);
  exit(1);
}

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * second_ns + (uint64_t)now.tv_nsec;
}

/* --- what is said --- */

static size_t put_head(uint8_t *at, size_t length, uint8_t type, uint8_t flags) {
  const uint8_t head[HEAD_BYTES] = {0, (uint8_t)(length >> 8), (uint8_t)length, type, flags};
  memcpy(at, head, HEAD_BYTES);
  return HEAD_BYTES;
}

#define HEADER(name, value) \
  { (uint8_t *)(name), (uint8_t *)(value), sizeof(name) - 1, sizeof(value) - 1, 0 }

static size_t put_call(uint8_t *bytes, size_t at, size_t *streams, nghttp2_hd_deflater *packer) {
  static const nghttp2_nv headers[] = {
      HEADER(":method", "POST"),
      HEADER(":scheme", "http"),
      HEADER(":authority", "127.0.0.1"),
      HEADER(":path", "/bench.Service/Method"),
      HEADER("content-type", "application/grpc"),
      HEADER("te", "trailers"),
      HEADER("mm-model-id", "model-0000000__isvc-0123456789"),
  };
  uint8_t block[BLOCK_BYTES_MAX];
  ssize_t length = nghttp2_hd_deflate_hd(packer, block, sizeof block, headers,
                                         sizeof headers / sizeof *headers);
  if (length < 0) die("the headers do not fit");
  streams[0] = at + 5;
  at += put_head(bytes + at, (size_t)length, HEADERS, END_HEADERS);
  memcpy(bytes + at, block, (size_t)length);
  at += (size_t)length;
  streams[1] = at + 5;
  at += put_head(bytes + at, BODY_BYTES, DATA, END_STREAM);
  memset(bytes + at, 0, BODY_BYTES);
  bytes[at + 4] = BODY_BYTES - 5;
  return at + BODY_BYTES;
}

static void prepare_calls(void) {
  static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
  nghttp2_hd_deflater *packer;
  if (nghttp2_hd_deflate_new(&packer, 4096) != 0) die("no memory");
  memcpy(first_call, preface, sizeof preface - 1);
  size_t at = sizeof preface - 1;
  at += put_head(first_call + at, 0, SETTINGS, 0);
  first_bytes = put_call(first_call, at, first_streams, packer);
  /* From the second on all headers are in the table, so all calls are alike. */
  next_bytes = put_call(next_call, 0, next_streams, packer);
  nghttp2_hd_deflate_del(packer);
}

static void say(struct peer *peer, const uint8_t *bytes, size_t length) {
  ssize_t n = peer->ssl ? SSL_write(peer->ssl, bytes, (int)length)
                        : send(peer->fd, bytes, length, MSG_NOSIGNAL);
  if (n != (ssize_t)length) die("a socket does not take a small request");
}

static void call(struct peer *peer) {
  int is_first = peer->stream == 0;
  uint8_t *bytes = is_first ? first_call : next_call;
  const size_t *streams = is_first ? first_streams : next_streams;
  peer->stream += is_first ? 1 : 2;
  uint32_t number = htonl(peer->stream);
  memcpy(bytes + streams[0], &number, 4);
  memcpy(bytes + streams[1], &number, 4);
  peer->came = 0;
  peer->is_calling = 1;
  say(peer, bytes, is_first ? first_bytes : next_bytes);
}

/* --- connections --- */

static int keep_session(SSL *ssl, SSL_SESSION *fresh) {
  /* Else OpenSSL would have none of it used twice. */
  SSL_CTX_set_session_cache_mode(SSL_get_SSL_CTX(ssl), SSL_SESS_CACHE_OFF);
  session = fresh;
  return 1;
}

static void prepare_tls(void) {
  static const unsigned char protocol[] = "\2h2";
  context = SSL_CTX_new(TLS_client_method());
  if (context == NULL || !SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION) ||
      !SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256") ||
      !SSL_CTX_set1_groups_list(context, "X25519") ||
      SSL_CTX_set_alpn_protos(context, protocol, 3) != 0)
    die("no TLS");
  SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
  SSL_CTX_set_session_cache_mode(context,
                                 SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL_STORE);
  if (strcmp(kind, "resumed") == 0) SSL_CTX_sess_set_new_cb(context, keep_session);
}

static void drop(struct peer *peer) {
  /* Else OpenSSL would not resume its session: it was not closed as it should be. */
  if (peer->ssl) SSL_set_shutdown(peer->ssl, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN);
  SSL_free(peer->ssl);
  close(peer->fd);
  free(peer);
}

static void shake(struct peer *peer) {
  int done = SSL_do_handshake(peer->ssl);
  if (done != 1) {
    if (SSL_get_error(peer->ssl, done) != SSL_ERROR_WANT_READ) die("a handshake failed");
    return;
  }
  int should = strcmp(kind, "resumed") == 0 && answered > 0;
  if (SSL_session_reused(peer->ssl) != should) die("a handshake was not of the kind asked for");
  peer->is_shaking = 0;
  call(peer);
}

static void open_peer(void) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
  struct peer *peer = calloc(1, sizeof *peer);
  int on = 1;
  if (peer == NULL) die("no memory");
  address.sin_port = htons((uint16_t)port);
  peer->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (peer->fd < 0) die("no file descriptor: raise the limit (ulimit -n)");
  if (connect(peer->fd, (struct sockaddr *)&address, sizeof address) < 0) die("connect");
  fcntl(peer->fd, F_SETFL, O_NONBLOCK);
  setsockopt(peer->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer};
  if (epoll_ctl(poller, EPOLL_CTL_ADD, peer->fd, &event) < 0) die("epoll_ctl");
  if (stays) peers[opened] = peer;
  opened++, opening++;
  if (context == NULL) {
    call(peer);
    return;
  }
  peer->ssl = SSL_new(context);
  if (peer->ssl == NULL || !SSL_set_fd(peer->ssl, peer->fd)) die("no memory");
  SSL_set_connect_state(peer->ssl);
  if (session != NULL) SSL_set_session(peer->ssl, session);
  peer->is_shaking = 1;
  shake(peer);
}

/* --- what comes --- */

/* An answer is whole. 0: the connection stays. */
static int note_answer(struct peer *peer) {
  if (!peer->is_calling || peer->came != REPLY_BYTES) die("an answer is not whole");
  peer->is_calling = 0;
  answered++;
  if (peer->stream == 1) {
    opening--;
    return stays ? 0 : -1;
  }
  if (took_count == took_max) die("more answers than calls");
  took_us[took_count++] = (uint32_t)((now_ns() - peer->due_ns) / 1000);
  if (peer->late_calls > 0) {
    peer->late_calls--;
    peer->due_ns += second_ns;
    call(peer);
  }
  return 0;
}

/* What a frame is, now that its head is here. */
static void take_head(struct peer *peer) {
  static uint8_t answer[HEAD_BYTES];
  const uint8_t *head = peer->head;
  uint32_t number;
  peer->frame_left = (uint32_t)head[0] << 16 | (uint32_t)head[1] << 8 | head[2];
  memcpy(&number, head + 5, 4);
  if (head[3] == RESET || head[3] == GOAWAY || head[3] == PING) die("reset, told to go, or pinged");
  if (head[3] == SETTINGS && !(head[4] & ACK)) {
    put_head(answer, 0, SETTINGS, ACK);
    say(peer, answer, HEAD_BYTES);
  }
  if (head[3] != DATA && head[3] != HEADERS) return;
  if (ntohl(number) != peer->stream) die("an answer to no call");
  if (head[3] == DATA) peer->came += peer->frame_left;
}

/* 0: the connection stays. */
static int take(struct peer *peer, const uint8_t *bytes, size_t length) {
  while (length > 0) {
    int in_head = peer->head_bytes < HEAD_BYTES;
    size_t n = in_head ? HEAD_BYTES - peer->head_bytes : peer->frame_left;
    if (n > length) n = length;
    if (in_head) {
      memcpy(peer->head + peer->head_bytes, bytes, n);
      peer->head_bytes += (uint32_t)n;
      if (peer->head_bytes == HEAD_BYTES) take_head(peer);
    } else {
      peer->frame_left -= (uint32_t)n;
    }
    bytes += n, length -= n;
    if (peer->head_bytes < HEAD_BYTES || peer->frame_left > 0) continue;
    peer->head_bytes = 0;
    int ends = peer->head[4] & END_STREAM && (peer->head[3] == DATA || peer->head[3] == HEADERS);
    if (ends && note_answer(peer) < 0) return -1;
  }
  return 0;
}

static void read_peer(struct peer *peer) {
  static uint8_t in[IN_BYTES];
  if (peer->is_shaking) {
    shake(peer);
    if (peer->is_shaking) return;
  }
  for (;;) {
    ssize_t n = peer->ssl ? SSL_read(peer->ssl, in, sizeof in) : recv(peer->fd, in, sizeof in, 0);
    if (n <= 0) {
      int is_open = peer->ssl ? SSL_get_error(peer->ssl, (int)n) == SSL_ERROR_WANT_READ
                              : n < 0 && errno == EAGAIN;
      if (!is_open) die("a connection was closed");
      return;
    }
    if (take(peer, in, (size_t)n) < 0) {
      drop(peer);
      return;
    }
    if (!peer->ssl && (size_t)n < sizeof in) return;
  }
}

static void wait_for_answers(uint64_t until_ns) {
  struct epoll_event events[EVENTS];
  uint64_t now = now_ns(), left_ns = until_ns > now ? until_ns - now : 0;
  struct timespec wait = {.tv_sec = (time_t)(left_ns / second_ns),
                          .tv_nsec = (long)(left_ns % second_ns)};
  int n = epoll_pwait2(poller, events, EVENTS, &wait, NULL);
  for (int i = 0; i < n; i++) read_peer(events[i].data.ptr);
}

/* --- what is done --- */

static void open_all(long at_once) {
  uint64_t silent_since_ns = now_ns();
  while (answered < asked) {
    long before = answered;
    /* The first one's session is there before the others begin. */
    long most = kind[0] == 'r' && answered == 0 ? 1 : at_once;
    while (opened < asked && opening < most) open_peer();
    wait_for_answers(now_ns() + second_ns);
    if (answered != before) silent_since_ns = now_ns();
    if (now_ns() - silent_since_ns > SILENT_S * second_ns) die("nothing came for long");
  }
}

static int ascending(const void *a, const void *b) {
  uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
  return one < other ? -1 : one > other;
}

static void pace(long seconds) {
  uint64_t began = now_ns();
  took_count = 0, took_max = seconds * asked;
  took_us = realloc(took_us, (size_t)took_max * sizeof *took_us);
  if (took_us == NULL) die("no memory");
  for (long i = 0; i < took_max;) {
    uint64_t due = began + (uint64_t)((double)i * 1e9 / (double)asked);
    if (due > now_ns()) {
      wait_for_answers(due);
      continue;
    }
    struct peer *peer = peers[i % asked];
    i++;
    if (peer->is_calling) {
      peer->late_calls++;
      continue;
    }
    peer->due_ns = due;
    call(peer);
    if (i % EVENTS == 0) wait_for_answers(0); /* However far behind. */
  }
  uint64_t until = now_ns() + SILENT_S * second_ns;
  while (took_count < took_max) {
    if (now_ns() > until) die("answers are missing");
    wait_for_answers(until);
  }
  qsort(took_us, (size_t)took_max, sizeof *took_us, ascending);
  printf("%ld %u %u\n", took_max, took_us[took_max / 2], took_us[took_max * 99 / 100]);
}

int main(int count, char **words) {
  if (count != 6) die("PORT CONNECTIONS AT_ONCE plain|full|resumed stays|goes");
  port = atoi(words[1]), asked = atol(words[2]), kind = words[4];
  stays = strcmp(words[5], "stays") == 0, poller = epoll_create1(0);
  peers = calloc((size_t)asked, sizeof *peers);
  if (peers == NULL) die("no memory");
  setvbuf(stdout, NULL, _IOLBF, 0);
  if (strcmp(kind, "plain") != 0) prepare_tls();
  prepare_calls();
  uint64_t began = now_ns();
  open_all(atol(words[3]));
  printf("%.6f\n", (double)(now_ns() - began) / 1e9);
  long seconds;
  while (scanf("%ld", &seconds) == 1) pace(seconds);
  return 0;
}
