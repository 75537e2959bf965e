// What every call sends, when it is repeated, and what errors say: on a small server of this process.

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer, type Http2Server } from "node:http2";
import type { AddressInfo, Socket } from "node:net";
import { after, afterEach, before, test } from "node:test";
import { Code, ConnectError, type ConnectRouter } from "@connectrpc/connect";
import { connectNodeAdapter } from "@connectrpc/connect-node";
import { AdapterService, CredentialsError, failureOf, GenerationService, ManyhatsClient } from "../src/index.js";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../src/gen/google/rpc/error_details_pb.js";

let server: Http2Server;
const sockets: Socket[] = [];
let url: string;
let seen: { method: string; headers: Headers }[] = [];
let refusals: ConnectError[] = [];
let hangUps = 0;
let onCall = () => {};

function note(method: string, headers: Headers): void {
  seen.push({ method, headers });
  onCall();
  if (hangUps > 0) {
    hangUps -= 1;
    sockets.forEach((socket) => socket.destroy());
  }
  const refusal = refusals.shift();
  if (refusal !== undefined) {
    throw refusal;
  }
}

function routes(router: ConnectRouter): void {
  router.service(GenerationService, {
    score(_request, { requestHeader }) {
      note("score", requestHeader);
      return { scores: [{ logprob: -1.5, numTokens: 2 }] };
    },
    async *generateStream(_request, { requestHeader }) {
      note("generateStream", requestHeader);
      yield { text: "Hello" };
    },
  });
  router.service(AdapterService, {
    registerAdapter(_request, { requestHeader }) {
      note("registerAdapter", requestHeader);
      return { created: true };
    },
  });
}

async function start(port: number): Promise<void> {
  server = createServer(connectNodeAdapter({ routes }));
  server.on("connection", (socket) => sockets.push(socket));
  server.listen(port, "127.0.0.1");
  await once(server, "listening");
}

before(async () => {
  await start(0);
  url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});

after(() => server.close());

afterEach(() => {
  seen = [];
  refusals = [];
  hangUps = 0;
  onCall = () => {};
});

async function withClient<T>(use: (client: ManyhatsClient) => Promise<T>, token?: string): Promise<T> {
  const client = new ManyhatsClient(url, token === undefined ? {} : { token });
  try {
    return await use(client);
  } finally {
    client.close();
  }
}

function full(seconds: number): ConnectError {
  const delay = { seconds: BigInt(Math.trunc(seconds)), nanos: (seconds % 1) * 1e9 };
  return new ConnectError("full", Code.ResourceExhausted, undefined, [
    { desc: ErrorInfoSchema, value: { reason: "QUEUE_FULL", metadata: { limit: "8" } } },
    { desc: RetryInfoSchema, value: { retryDelay: delay } },
  ]);
}

const score = (client: ManyhatsClient) => client.score("a", [" b"], { taskId: "sql@3" });

test("the token and the task are in the header", async () => {
  await withClient(score, "secret");
  await withClient((client) => client.score("a", ["b"]));
  await withClient((client) => client.score("a", ["b"], { taskId: "Größe" }));
  await withClient(async (client) => {
    for await (const { text } of client.generation.generateStream({ taskId: "tldr" })) {
      assert.equal(text, "Hello");
    }
  });
  assert.deepEqual(
    seen.map(({ headers }) => [headers.get("authorization"), headers.get("x-manyhats-task")]),
    [["Bearer secret", "sql@3"], [null, null], [null, null], [null, "tldr"]],
  );
});

test("a refused call is repeated when the server says", async () => {
  refusals = [full(0.4), full(0.4)];
  const began = performance.now();
  const [scored] = await withClient(score);
  assert.equal(scored?.logprob, -1.5);
  assert.equal(seen.length, 3);
  assert.ok(performance.now() - began >= 800);
});

test("a call that found no server is repeated, four times at most", async () => {
  refusals = Array.from({ length: 9 }, () => new ConnectError("restarting", Code.Unavailable));
  await assert.rejects(withClient(score), { code: Code.Unavailable });
  assert.equal(seen.length, 4);
});

test("a server that restarts is found again", async () => {
  await withClient(async (client) => {
    await score(client);
    sockets.forEach((socket) => socket.destroy());
    server.close();
    await once(server, "close");
    setTimeout(() => void start(Number(new URL(url).port)), 300);
    const [scored] = await score(client);
    assert.equal(scored?.logprob, -1.5);
    assert.equal(seen.length, 2);
  });
});

test("a call whose connection breaks is repeated, if it changes nothing", async () => {
  hangUps = 1;
  assert.equal((await withClient(score))[0]?.logprob, -1.5);
  assert.equal(seen.length, 2);
  hangUps = 1;
  await assert.rejects(withClient((client) => client.adapters.registerAdapter({ taskId: "sql", uri: "sql" })));
  assert.equal(seen.length, 3);
});

test("a call that its caller has aborted is not repeated", async () => {
  const caller = new AbortController();
  onCall = () => caller.abort();
  hangUps = 1;
  const call = withClient((client) => client.score("a", ["b"], { signal: caller.signal }));
  await assert.rejects(call, { code: Code.Canceled });
  assert.equal(seen.length, 1);
});

test("what the server cancels is not repeated", async () => {
  refusals = [new ConnectError("cancelled", Code.Canceled)];
  await assert.rejects(withClient(score), { code: Code.Canceled });
  assert.equal(seen.length, 1);
});

test("what is full for good, or pushed back, is not repeated", async () => {
  refusals = [new ConnectError("store full", Code.ResourceExhausted)];
  await assert.rejects(withClient(score), { code: Code.ResourceExhausted });
  const pushed = full(0.1);
  pushed.metadata.set("grpc-retry-pushback-ms", "-1");
  refusals = [pushed];
  await assert.rejects(withClient(score), { code: Code.ResourceExhausted });
  assert.equal(seen.length, 2);
});

test("what may have been done is repeated only with a request id", async () => {
  const register = (requestId: string) =>
    withClient((client) => client.adapters.registerAdapter({ taskId: "sql", uri: "sql", requestId }));
  refusals = [new ConnectError("gone", Code.Unavailable)];
  await assert.rejects(register(""), { code: Code.Unavailable });
  assert.equal(seen.length, 1);
  refusals = [new ConnectError("gone", Code.Unavailable)];
  await register("r");
  assert.equal(seen.length, 3);
  refusals = [full(0.1)];
  await register("");
  assert.equal(seen.length, 5);
});

test("the deadline ends the repeats", async () => {
  refusals = [full(60)];
  await assert.rejects(
    withClient((client) => client.score("a", ["b"], { timeoutMs: 1500 })),
    { code: Code.DeadlineExceeded },
  );
  assert.equal(seen.length, 1);
});

test("an error has the server's reason, fields and time", async () => {
  refusals = [
    new ConnectError("top_p: must be in (0, 1]", Code.InvalidArgument, undefined, [
      { desc: ErrorInfoSchema, value: { reason: "FIELD_INVALID", metadata: { field: "top_p" } } },
      { desc: BadRequestSchema, value: { fieldViolations: [{ field: "top_p", description: "must be in (0, 1]" }] } },
    ]),
  ];
  const error = await withClient(score).catch((caught: unknown) => caught);
  assert.deepEqual(failureOf(error), {
    reason: "FIELD_INVALID",
    metadata: { field: "top_p" },
    violations: { top_p: "must be in (0, 1]" },
  });
  refusals = Array.from({ length: 4 }, () => full(0.1));
  const { retryAfterMs } = failureOf(await withClient(score).catch((caught: unknown) => caught));
  assert.equal(retryAfterMs, 100);
  assert.deepEqual(failureOf(new Error("another")), { reason: "", metadata: {}, violations: {} });
});

test("credentials that cannot be used are refused", () => {
  const refused = (address: string, options: object, message: RegExp) =>
    assert.throws(() => new ManyhatsClient(address, options), (error) => {
      assert.ok(error instanceof CredentialsError);
      assert.match(error.message, message);
      return true;
    });
  refused("http://gpu-1:50051", { token: "secret" }, /readable by anyone between here and gpu-1:50051/);
  refused("http://127.evil.example:50051", { token: "secret" }, /readable by anyone/);
  refused(url, { token: "two words" }, /one word/);
  refused("https://gpu-1:50051", { cert: "…" }, /given together/);
  refused(url, { ca: "…" }, /not encrypted/);
  new ManyhatsClient("http://gpu-1:50051", { token: "secret", allowClearToken: true }).close();
  new ManyhatsClient("http://[::1]:50051", { token: "secret" }).close();
});
