import { ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** What the server says of a call that failed, besides the code and the message of the `ConnectError`. */
export interface Failure {
  /** Such as "TASK_NOT_FOUND"; empty if the error is not the server's own. */
  reason: string;
  /** What belongs to the reason, such as the limit or the tensor at fault. */
  metadata: Record<string, string>;
  /** Every field at fault → what is wrong with it. */
  violations: Record<string, string>;
  /** When to try again; absent if the server does not say. */
  retryAfterMs?: number;
}

/** The server's own account of an error; of any other error an empty one. */
export function failureOf(error: unknown): Failure {
  const failure: Failure = { reason: "", metadata: {}, violations: {} };
  if (!(error instanceof ConnectError)) {
    return failure;
  }
  for (const info of error.findDetails(ErrorInfoSchema)) {
    failure.reason = info.reason;
    failure.metadata = { ...info.metadata };
  }
  for (const request of error.findDetails(BadRequestSchema)) {
    for (const { field, description } of request.fieldViolations) {
      failure.violations[field] ??= description;
    }
  }
  for (const { retryDelay } of error.findDetails(RetryInfoSchema)) {
    failure.retryAfterMs = Number(retryDelay?.seconds ?? 0) * 1000 + (retryDelay?.nanos ?? 0) / 1e6;
  }
  return failure;
}
