import { setTimeout as sleep } from "node:timers/promises";
import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";
import { createAsyncIterable } from "@connectrpc/connect/protocol";
import { failureOf } from "./errors.js";

// By which proxies send a task's calls to the replica that holds it; servers ignore it.
const TASK_HEADER = "x-manyhats-task";

const MAX_ATTEMPTS = 4;
const FIRST_DELAY_MS = 200;
const MAX_DELAY_MS = 5000;
// Those that were refused together do not come again together.
const SPREAD = 0.25;
// What a header can have, and a task's name may.
const TASK = /^[a-z0-9][a-z0-9._-]{0,62}(@[0-9]{1,10})?$/;
// Calls that change nothing. A server that went away may have done any other, unless a request_id makes that safe; one
// that refuses has done nothing.
const READS = /^(Generate|Score|Tokenize|Embed|Classify|ClassifyTokens|Rerank|Get.*|List.*)$/;

/** Shows the token with every call. */
export function showToken(token: string): Interceptor {
  return (next) => (request) => {
    request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
}

/** Names the task of every call that has one in its header, too; uploads do so themselves. */
export const nameTask: Interceptor = (next) => async (request) => {
  if (!request.stream) {
    setTask(request.header, request.message);
  } else if (request.method.methodKind === "server_streaming") {
    for await (const message of request.message) {
      setTask(request.header, message);
      return next({ ...request, message: createAsyncIterable([message]) });
    }
  }
  return next(request);
};

/** Sets the header for a message that names a task, or several, of which it is the first. */
export function setTask(header: Headers, message: object): void {
  const { taskId, taskIds } = message as { taskId?: string; taskIds?: string[] };
  const task = taskIds?.[0] ?? taskId ?? "";
  if (TASK.test(task)) {
    header.set(TASK_HEADER, task);
  }
}

/** Repeats calls that the server refuses for now, or whose connection fails; four attempts at most, until the deadline. */
export const retry: Interceptor = (next) => async (request) => {
  if (request.stream) {
    return next(request);
  }
  const { requestId } = request.message as { requestId?: string };
  const isSafe = READS.test(request.method.name) || !!requestId;
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await next(request);
    } catch (error) {
      const delayMs = attempt < MAX_ATTEMPTS ? delayAfter(error, attempt, isSafe) : undefined;
      if (delayMs === undefined || request.signal.aborted) {
        throw error;
      }
      try {
        await sleep(delayMs, undefined, { signal: request.signal });
      } catch {
        throw ConnectError.from(request.signal.reason);
      }
    }
  }
};

/** Whether the connection broke before the server's status came. Node then cancels the call, or fails by itself. */
function isConnectionLost(error: ConnectError): boolean {
  const { code } = (error.cause ?? {}) as { code?: unknown };
  const isBroken = error.code === Code.Canceled || /^(ECONNRESET|EPIPE|ERR_HTTP2_\w+)$/.test(String(code));
  return isBroken && !error.metadata.has("grpc-status");
}

/** How long to wait before the next attempt; undefined if there is to be none. */
function delayAfter(error: unknown, attempt: number, isSafe: boolean): number | undefined {
  if (!(error instanceof ConnectError)) {
    return undefined;
  }
  const pushback = error.metadata.get("grpc-retry-pushback-ms");
  const saidMs = pushback === null ? failureOf(error).retryAfterMs : Number(pushback);
  const isRefused = error.code === Code.ResourceExhausted && saidMs !== undefined;
  const isGone = isSafe && (error.code === Code.Unavailable || isConnectionLost(error));
  if (!(isRefused || isGone) || (saidMs !== undefined && !(saidMs >= 0))) {
    return undefined;
  }
  const backoffMs = Math.min(FIRST_DELAY_MS * 2 ** (attempt - 1), MAX_DELAY_MS);
  return Math.max(saidMs ?? 0, backoffMs) * (1 + SPREAD * Math.random());
}
